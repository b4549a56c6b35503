"""What a run is asked to do: the run file and the data file as frozen models, and SimpleTuner's forms of both. Reads
those files and touches nothing else.

Entries: `config.run_reader.read_written`, `config.data_file.load_data_file`.
"""
