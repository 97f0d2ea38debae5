"""Values only: shapes, errors, registry, config, routing, context, statistics."""
