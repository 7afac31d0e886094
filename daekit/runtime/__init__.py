"""From a recipe to live objects: the only room that knows both."""
