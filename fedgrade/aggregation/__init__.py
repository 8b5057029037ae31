"""What the coordinator does with replies: pure functions of public numbers. Knows nothing of networks or sites."""
