"""The volunteer's side: join a run, train a slot of each round, exchange averages, serve evidence."""
