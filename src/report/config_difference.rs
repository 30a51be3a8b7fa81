//! In which settings runs differ.

use std::collections::BTreeMap;

use toml::Value;

/// Every setting of a config by its dotted name; tasks by their names, as `--set` addresses them.
pub fn flat(config: &toml::Table) -> BTreeMap<String, String> {
    let mut settings = BTreeMap::new();
    config.iter().for_each(|(key, value)| flatten(key, value, &mut settings));
    settings
}

fn flatten(name: &str, value: &Value, settings: &mut BTreeMap<String, String>) {
    match value {
        Value::Table(table) => table.iter().for_each(|(key, value)| flatten(&format!("{name}.{key}"), value, settings)),
        Value::Array(items) if items.iter().any(Value::is_table) => {
            for (i, item) in items.iter().enumerate() {
                let own = item.get("name").and_then(Value::as_str).map_or(i.to_string(), str::to_owned);
                flatten(&format!("{name}.{own}"), item, settings);
            }
        }
        plain => {
            settings.insert(name.to_owned(), plain.to_string());
        }
    }
}

/// The settings that are not the same in all configs, with each config's value, if it has one.
pub fn differences(configs: &[&toml::Table]) -> Vec<(String, Vec<Option<String>>)> {
    let flat: Vec<_> = configs.iter().map(|config| flat(config)).collect();
    let mut names: Vec<&String> = flat.iter().flat_map(BTreeMap::keys).collect();
    names.sort();
    names.dedup();
    let values = |name: &String| flat.iter().map(|settings| settings.get(name).cloned()).collect::<Vec<_>>();
    let rows = names.into_iter().map(|name| (name.clone(), values(name)));
    rows.filter(|(_, values)| values.iter().any(|value| *value != values[0])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_listed() {
        let parse = |text: &str| text.parse::<toml::Table>().unwrap();
        let a = parse("[run]\nseed = 1\nname = \"a\"\n[[task]]\nname = \"x\"\nweight = 1.0\n[[task]]\nname = \"y\"\nweight = 1.0\n");
        let b = parse("[run]\nseed = 2\nname = \"a\"\n[[task]]\nname = \"y\"\nweight = 0.5\nimages = [1, 2]\n");
        let text = |value: &str| Some(value.to_owned());
        assert_eq!(
            differences(&[&a, &b]),
            [
                ("run.seed".to_owned(), vec![text("1"), text("2")]),
                ("task.x.name".to_owned(), vec![text("\"x\""), None]),
                ("task.x.weight".to_owned(), vec![text("1.0"), None]),
                ("task.y.images".to_owned(), vec![None, text("[1, 2]")]),
                ("task.y.weight".to_owned(), vec![text("1.0"), text("0.5")]),
            ]
        );
        assert!(differences(&[&a]).is_empty() && differences(&[&a, &a]).is_empty());
    }
}
