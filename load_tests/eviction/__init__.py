"""Which resident blocks should go first when their slots are needed: policies compared over traces."""
