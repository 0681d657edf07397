"""What a run will need, before anything is started: which role sits where, and the bytes and seconds of it all."""
