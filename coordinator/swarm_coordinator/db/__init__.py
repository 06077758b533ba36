"""What the coordinator remembers: SQLite through SQLAlchemy. One writer; readers see whole transactions only."""
