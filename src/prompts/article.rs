//! The indefinite article of a noun phrase.

/// Written with a vowel but spoken with a consonant at the start ("a utility pole"); prefixes, lower case.
const SPOKEN_CONSONANT: [&str; 6] = ["uni", "util", "use", "eu", "one", "ukulele"];
/// Written with a consonant but spoken with a vowel at the start; prefixes, lower case.
const SPOKEN_VOWEL: [&str; 5] = ["hour", "heir", "honest", "suv", "x-ray"];
/// Prefixes of [`SPOKEN_CONSONANT`] that mislead ("an uninvited guest").
const STILL_VOWEL: [&str; 2] = ["unin", "unim"];

/// `name` with "a" or "an" before it, by how it is spoken. Plural and mass names get an article too ("a jeans"):
/// the paper's templates know no others.
pub fn with_article(name: &str) -> String {
    let lower = name.to_lowercase();
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
}
