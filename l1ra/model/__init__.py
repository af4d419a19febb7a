"""Operations on a model: patch, merge, load, and their inverses."""
