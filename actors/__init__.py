"""The roles as processes: plain classes that know nothing of Ray. Imported as ``rayrlhf.actors``."""
