"""What runs models: this process, a server, a Ray cluster. `method.engine` says what the method asks of them."""
