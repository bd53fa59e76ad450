"""The functions behind the built-in tools: MiniMind's eight, and minimind-ascend's search. They run in `worker`.

Apart from arithmetic, text lengths and unit conversion they stand for services: their tables are those of MiniMind's
train_agent.py, so that the answers (`gt`) in MiniMind's agent_rl.jsonl are right. With MINIMIND_TOOLS_SEED set, the
clock stands at 2025-03-07 14:30 in Shanghai and random numbers repeat.
"""

from __future__ import annotations

import datetime
import os
import random
import zoneinfo

from minimind_mcore.tools.arithmetic import Number, evaluate

SEED = "MINIMIND_TOOLS_SEED"
FIXED_TIME = datetime.datetime(2025, 3, 7, 6, 30, tzinfo=datetime.timezone.utc)
WEATHER = {
    "北京": ("28°C", "晴"), "上海": ("15°C", "多云"), "广州": ("32°C", "闷热"), "深圳": ("30°C", "晴"),
    "杭州": ("22°C", "阴"), "成都": ("18°C", "小雨"), "武汉": ("25°C", "多云"), "南京": ("20°C", "晴"),
    "西安": ("16°C", "大风"), "重庆": ("26°C", "阴"), "Tokyo": ("12°C", "晴"), "New York": ("8°C", "多云"),
    "London": ("5°C", "小雨"), "Paris": ("10°C", "阴"), "Sydney": ("25°C", "晴朗"),
}  # fmt: skip
RATES = {
    ("USD", "CNY"): 7.21, ("EUR", "CNY"): 7.85, ("GBP", "CNY"): 9.12, ("JPY", "CNY"): 0.048, ("USD", "EUR"): 0.92,
    ("USD", "GBP"): 0.79, ("CNY", "JPY"): 20.83, ("AUD", "CNY"): 4.72,
}  # fmt: skip
TRANSLATIONS = {
    ("你好世界", "english"): "Hello World", ("Good morning", "chinese"): "早上好",
    ("今天天气真好", "english"): "The weather is nice today", ("I love programming", "chinese"): "我喜欢编程",
    ("机器学习很有趣", "english"): "Machine learning is interesting", ("Happy birthday", "chinese"): "生日快乐",
}  # fmt: skip
# MiniMind's factors. Temperatures are multiplied too, without the 32 degrees, as in its data.
FACTORS = {
    ("km", "miles"): 0.621371, ("miles", "km"): 1.60934, ("kg", "pounds"): 2.20462, ("pounds", "kg"): 0.453592,
    ("meters", "feet"): 3.28084, ("feet", "meters"): 0.3048, ("celsius", "fahrenheit"): 1.8,
    ("fahrenheit", "celsius"): 0.5556,
}  # fmt: skip


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
    """Return search results."""
    return {"results": [f"About {query}: no search engine is connected to this tool."]}
