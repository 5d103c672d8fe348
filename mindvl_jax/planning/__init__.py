"""Does a run fit its devices? Answered before it starts, on any machine: `mindvl plan`, docs/plan.md."""
