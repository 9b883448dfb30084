"""Stage one: compute the frozen encoders' features once, store and maintain them."""
