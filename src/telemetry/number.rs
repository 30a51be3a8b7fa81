//! Numbers in JSON, without loss: a finite f64 as its shortest round-trip form, the others as "NaN", "inf", "-inf".
//!
//! JSON has no word for a number that is not finite, and the usual way out, `null`, hides which of the three it was.
//! For serde: `#[serde(with = "number")]`.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

pub(crate) fn to_value(number: f64) -> Value {
    match serde_json::Number::from_f64(number) {
        Some(finite) => Value::Number(finite),
        None => Value::String(word(number).to_owned()),
    }
}

/// `None` if `value` is neither a number nor one of the three words.
pub(crate) fn from_value(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => match text.as_str() {
            "NaN" => Some(f64::NAN),
            "inf" => Some(f64::INFINITY),
            "-inf" => Some(f64::NEG_INFINITY),
            _ => None,
        },
        _ => None,
    }
}

fn word(number: f64) -> &'static str {
    if number.is_nan() {
        "NaN"
    } else if number > 0.0 {
        "inf"
    } else {
        "-inf"
    }
}

pub(crate) fn serialize<S: Serializer>(number: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    to_value(*number).serialize(serializer)
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let value = Value::deserialize(deserializer)?;
    from_value(&value).ok_or_else(|| {
        serde::de::Error::custom(format!("expected a number, \"NaN\", \"inf\" or \"-inf\", got {value}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_number_survives_text_bit_for_bit() {
        // 1/3 and its like need all 17 digits; the two after it are known to be misread by fast parsers
        let awkward =
            [0.0, -0.0, 1.0 / 3.0, 0.1 + 0.2, 5e-324, f64::MAX, -1.7976931348623155e308, 1e23, 9007199254740993.0];
        for number in awkward.into_iter().chain([f64::INFINITY, f64::NEG_INFINITY]) {
            let text = to_value(number).to_string();
            let read = from_value(&serde_json::from_str(&text).unwrap()).unwrap();
            assert_eq!(read.to_bits(), number.to_bits(), "{text}");
        }
        assert!(from_value(&serde_json::from_str(&to_value(f64::NAN).to_string()).unwrap()).unwrap().is_nan());
    }

    /// serde_json reads floats to within one unit in the last place unless built with `float_roundtrip`.
    #[test]
    fn random_bit_patterns_survive_text() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..20_000 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let number = f64::from_bits(state);
            if number.is_finite() {
                let text = to_value(number).to_string();
                let read = from_value(&serde_json::from_str(&text).unwrap()).unwrap();
                assert_eq!(read.to_bits(), number.to_bits(), "{text}");
            }
        }
    }

    #[test]
    fn null_and_other_words_are_no_numbers() {
        for text in ["null", "true", "\"nan\"", "[1]", "\"\""] {
            assert_eq!(from_value(&serde_json::from_str(text).unwrap()), None, "{text}");
        }
    }
}
