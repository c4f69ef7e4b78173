"""`jaxgen bench`: measurements of the engine, each with its floor or its opponent beside it."""
