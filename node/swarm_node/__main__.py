"""`python -m swarm_node`."""

from swarm_node.cli import main

if __name__ == "__main__":
    main()
