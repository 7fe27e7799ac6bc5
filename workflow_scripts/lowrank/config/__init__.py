"""The study's configuration: what may be written in `config/*.yaml`, and how it is checked."""
