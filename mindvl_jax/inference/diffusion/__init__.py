"""Images out of noise: solvers of the flow, and whole models run with them."""
