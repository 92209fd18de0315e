"""The plug-ins of `examples/plugins`, each loaded by the framework that it is for, as that framework loads it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_trainer_trl_scripts import load_script
