"""`python -m swarm_coordinator`."""

from swarm_coordinator.cli import main

if __name__ == "__main__":
    main()
