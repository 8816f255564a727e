"""HTML pages of runs and of attention, each complete in one file: style sheet, script and data are inlined.

report_page and attention_page make whole pages; chart and history make parts of a report; markup makes elements. May
import from train, model and data, but nothing from the rest of launch.
"""
