"""What a flow run holds, and what becomes of one that died. Entry: `run_lease`."""
