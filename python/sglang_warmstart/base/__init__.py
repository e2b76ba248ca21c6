"""The ground floor: every room uses it, and it uses none of them."""
