"""Random calls of every public function against an oracle of their own, in float64."""
