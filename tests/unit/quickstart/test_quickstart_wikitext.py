import pytest
import wikitext


@pytest.mark.parametrize(
    ("markup", "prose"),
    [
        ("'''Albedo''' is ''whiteness''.", "Albedo is whiteness."),
        ("A [[planet|planet's]] [[surface]].", "A planet's surface."),
        ("See [https://example.org the page].", "See the page."),
        ("Snow{{cite|a={{nested|b}}|c}} is white.", "Snow is white."),
        ("Snow<ref name='a/b'>Source</ref> and ice<ref name='a/b' /> melt.", "Snow and ice melt."),
        ("Ice<ref>one</ref><references /> melts.", "Ice melts."),
        ("[[File:Snow.jpg|thumb|Snow on [[Everest]]]]Snow falls.", "Snow falls."),
        ("Before\n{| class='wikitable'\n| cell\n{| nested\n|}\n|}\nAfter", "Before\n\nAfter"),
        ("Albedo ({{IPA|x}}; Latin) and ({{IPA|y}})", "Albedo (Latin) and"),
        ("less &lt;b> than &ndash; a&nbsp;dash", "less <b> than – a dash"),
        ("* one\n## two", "one\ntwo"),
        ("H<sub>2</sub>O <!-- hidden --> <math>x^2</math>", "H2O"),
        ("Text\n== Uses ==\nMore\n== See also ==\n* [[Link]]", "Text\n\nUses\n\nMore"),
    ],
)
def test_markup_becomes_prose(markup, prose):
    assert wikitext.to_prose(markup) == prose


def test_unbalanced_markup_ends():
    assert "kept" in wikitext.to_prose("{{open [[File:x kept {| <ref>")
