"""The functions behind the built-in tools: MiniMind's eight, and minimind-ascend's search. They run in `worker`.

The weather, exchange rate, translation and search tools replace online services. Their tables (builtin.json) are from
MiniMind's train_agent.py, so the results match the answers (`gt`) in MiniMind's agent_rl.jsonl. With
MINIMIND_TOOLS_SEED set, the clock stands at 2025-03-07 14:30 in Shanghai and random numbers repeat.
"""

from __future__ import annotations

import datetime
import os
import random
import zoneinfo

from minimind_mcore.paths import package_json
from minimind_mcore.tools.arithmetic import Number, evaluate

SEED = "MINIMIND_TOOLS_SEED"
FIXED_TIME = datetime.datetime(2025, 3, 7, 6, 30, tzinfo=datetime.timezone.utc)
TABLES = package_json("tools/builtin.json")
WEATHER = {city: (temperature, condition) for city, temperature, condition in TABLES["weather"]}
RATES = {(source, target): rate for source, target, rate in TABLES["rates"]}
TRANSLATIONS = {(text, language): translation for text, language, translation in TABLES["translations"]}
# MiniMind's factors. Temperatures are only multiplied, without adding 32 degrees, because MiniMind's data does so.
FACTORS = {(source, target): factor for source, target, factor in TABLES["factors"]}


def calculate_math(expression: str) -> dict[str, str]:
    """Evaluate an arithmetic expression."""
    return {"result": str(evaluate(str(expression)))}


def get_current_time(timezone: str = "Asia/Shanghai") -> dict[str, str]:
    """Return date and time in a time zone."""
    now = FIXED_TIME if SEED in os.environ else datetime.datetime.now(datetime.timezone.utc)
    local = now.astimezone(zoneinfo.ZoneInfo(timezone))
    return {"datetime": local.strftime("%Y-%m-%d %H:%M:%S"), "timezone": timezone}


def random_number(min: int = 0, max: int = 100) -> dict[str, int]:
    """Return a random whole number from `min` to `max`."""
    source = random.Random(f"{os.environ[SEED]} {min} {max}") if SEED in os.environ else random.SystemRandom()
    return {"result": source.randint(int(min), int(max))}


def text_length(text: str) -> dict[str, int]:
    """Count characters and words."""
    return {"characters": len(text), "words": len(text.split())}


def unit_converter(value: Number, from_unit: str, to_unit: str) -> dict[str, str | float]:
    """Convert between the units of `FACTORS`; other pairs have the factor 1, as in MiniMind."""
    factor = FACTORS.get((from_unit.lower(), to_unit.lower()), 1)
    return {"result": round(float(value) * factor, 4), "from": f"{value} {from_unit}", "to": to_unit}


def get_current_weather(location: str, unit: str = "celsius") -> dict[str, str]:
    """Return the weather of a city."""
    temperature, condition = WEATHER.get(location, ("22°C", "晴"))
    if unit == "fahrenheit":
        temperature = f"{round(int(temperature[:-2]) * 9 / 5 + 32)}°F"
    return {"city": location, "temperature": temperature, "humidity": "65%", "condition": condition}


def get_exchange_rate(from_currency: str, to_currency: str) -> dict[str, str | float]:
    """Return the rate between two currencies."""
    return {"from": from_currency, "to": to_currency, "rate": RATES.get((from_currency, to_currency), 1.0)}


def translate_text(text: str, target_language: str) -> dict[str, str]:
    """Translate the texts of `TRANSLATIONS`; others are returned as they are."""
    return {"translated_text": TRANSLATIONS.get((text, target_language.lower()), text)}


def search(query: str) -> dict[str, list[str]]:
    """Return one result, which says that no search engine is connected."""
    return {"results": [f"About {query}: no search engine is connected to this tool."]}
