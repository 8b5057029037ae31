from tests.report.folders import federations, troubled_folder

__all__ = ["federations", "troubled_folder"]
