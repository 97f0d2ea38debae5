"""Flexpert inside other libraries: one package for each, imported only by those who use it."""
