"""Models with weights, on the Hugging Face Hub and beside the code, and the recipes that train them."""
