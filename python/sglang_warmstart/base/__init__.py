"""What every room uses; it uses none of them."""
