"""The relational store: tables, migrations and the engine that hands out transactions."""
