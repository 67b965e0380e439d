"""The engine of a worker: it claims deliveries, runs their consumers and writes down what became of them."""
