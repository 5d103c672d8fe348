"""The console command `mindvl`, one file a subcommand."""
