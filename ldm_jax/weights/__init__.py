"""Other people's checkpoints: readers, and tables from their names to our parameter trees."""
