"""Fault runs: something is killed, cut off or doubled in a chosen phase of a change to an app, and the app, its
record, its processes and its files must be right afterwards.

    cells       what is combined: the phases, the faults, and which of them go together
    world       one `aether up` with its folders, seen from outside: database, processes, files
    prober      a visitor that asks the app all the time and remembers every answer
    client      a client of the API that survives restarts of the server and can vanish
    operations  the changes under fault: deploy, scale, rollback, config, delete, by API and by CLI
    phases      how each phase is recognised from outside
    strikes     how each fault is done
    invariants  what must hold afterwards
    series      runs by a seed, one server for all of them
    table       what came of them as a page of the docs
"""
