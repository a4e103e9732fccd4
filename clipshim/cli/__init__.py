"""The commands of clipshim, one module a command, loaded only when it runs.

Only this package prints, reads the terminal and exits. No mechanism lives here: a command turns
options into calls of the other packages and their answers into text or JSON.
"""
