"""Stage one: what the frozen encoders give, computed once, stored, and looked after."""
