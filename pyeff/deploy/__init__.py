"""A trained network in the form in which it runs elsewhere."""

from pyeff.deploy.export import ExportReport, export

__all__ = ["ExportReport", "export"]
