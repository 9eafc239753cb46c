"""Networks that someone has already, as other ones: expanded for training, contracted to run."""

from pyeff.convert.contract import contract, contract_with_report
from pyeff.convert.contract_report import ContractedLayer, ContractReport
from pyeff.convert.expand import expand, expand_with_report
from pyeff.convert.expand_report import ExpandedLayer, ExpandReport
from pyeff.convert.linearise import linearise

__all__ = [
    "ContractReport",
    "ContractedLayer",
    "ExpandReport",
    "ExpandedLayer",
    "contract",
    "contract_with_report",
    "expand",
    "expand_with_report",
    "linearise",
]
