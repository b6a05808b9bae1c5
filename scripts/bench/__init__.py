"""The benchmark against fairchem-core: a worker process per implementation and a driver that times them."""
