"""The Prefect server and its worker: started, kept alive, closed to strangers. Entry: `ui`."""
