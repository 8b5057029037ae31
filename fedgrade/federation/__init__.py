"""One site that answers, one loop that asks, and the messages between them. Knows no Flower and no Hydra."""
