"""Starts the Errata MCP server: `python server.py --help`."""

from errata import main

if __name__ == "__main__":
    main()
