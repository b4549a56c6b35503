"""The settings of a run: the run file and the data file as frozen models, and SimpleTuner's forms of both.

It reads those two files and nothing else. Entries: `config.run_reader.read_written`, `config.data_file.load_data_file`.
"""
