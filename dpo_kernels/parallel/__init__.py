"""One call on many ranks, over torch.distributed: a split vocabulary, and split sequences.

groups.py has what a group may be and every collective; vocabulary.py merges what the ranks know of
a row, sequence.py adds what they know of a sequence; agreement.py compares the arguments of ranks.
Above the log-probs of tokens a call is the same code as on one device.
"""
