//! The indefinite article of a noun phrase.

/// Written with a vowel but spoken with a consonant at the start ("a utility pole"); prefixes, lower case.
const SPOKEN_CONSONANT: [&str; 6] = ["uni", "util", "use", "eu", "one", "ukulele"];
/// Written with a consonant but spoken with a vowel at the start; prefixes, lower case.
const SPOKEN_VOWEL: [&str; 5] = ["hour", "heir", "honest", "suv", "x-ray"];
/// Prefixes of [`SPOKEN_CONSONANT`] that mislead ("an uninvited guest").
const STILL_VOWEL: [&str; 2] = ["unin", "unim"];

/// Plural and mass names among the paper's objects: no article stands before them ("scissors near a book").
const WITHOUT: [&str; 48] = [
    "asparagus",
    "baozi",
    "bar soap",
    "beer",
    "binoculars",
    "boots",
    "bread",
    "broccoli",
    "candy",
    "cheese",
    "chips",
    "chopsticks",
    "coffee",
    "corn",
    "dates",
    "dice",
    "earrings",
    "french fries",
    "garlic",
    "glasses",
    "goggles",
    "green beans",
    "green vegetables",
    "headphones",
    "high heels",
    "jeans",
    "juice",
    "lavender",
    "lettuce",
    "liquid soap",
    "luggage",
    "meat balls",
    "nuts",
    "okra",
    "pasta",
    "popcorn",
    "rice",
    "sandals",
    "scissors",
    "shellfish",
    "slippers",
    "sneakers",
    "stairs",
    "sunglasses",
    "sushi",
    "swimwear",
    "toothpaste",
    "trousers",
];

/// `name` with "a" or "an" before it, by how it is spoken, or alone where it is a plural or mass name (of the paper's
/// objects, listed here). The paper shows its templates with singular names only.
pub fn with_article(name: &str) -> String {
    let lower = name.to_lowercase();
    if WITHOUT.binary_search(&lower.as_str()).is_ok() {
        return name.to_owned();
    }
    let starts = |prefixes: &[&str]| prefixes.iter().any(|prefix| lower.starts_with(prefix));
    let vowel = starts(&SPOKEN_VOWEL)
        || (lower.starts_with(['a', 'e', 'i', 'o', 'u']) && (!starts(&SPOKEN_CONSONANT) || starts(&STILL_VOWEL)));
    format!("{} {name}", if vowel { "an" } else { "a" })
}

#[cfg(test)]
mod tests {
    use super::with_article;

    #[test]
    fn by_sound_and_not_by_letter() {
        for phrase in [
            "an apple",
            "a ball",
            "an umbrella",
            "a utility pole",
            "an hour",
            "an suv",
            "a tv",
            "an electric drill",
            "a TV presenter",
            "an onion",
            "a one-way street",
            "an egg tart",
            "a unicycle",
            "a house",
        ] {
            let (_, name) = phrase.split_once(' ').unwrap();
            assert_eq!(with_article(name), phrase);
        }
    }

    #[test]
    fn plural_and_mass_names_stand_alone() {
        assert!(super::WITHOUT.is_sorted(), "the list is searched by halves");
        let objects = crate::prompts::paper::objects();
        for name in super::WITHOUT {
            assert!(objects.iter().any(|o| o == name), "{name} is none of the paper's objects");
            assert_eq!(with_article(name), name);
        }
        assert_eq!(with_article("boot"), "a boot");
    }
}
