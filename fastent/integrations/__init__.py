"""The monitor in the tools that people train with: a module for each host, which alone imports it."""

from fastent.installation import refuse_another

refuse_another()
