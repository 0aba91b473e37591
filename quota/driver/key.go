package driver

import (
	"strings"

	"github.com/fleetquota/fleetquota/quota"
)

// AppendKey appends the text under which stores keep a limit and key, and returns the extended slice:
// "{group}/rest:limit", or "{group}:limit" where the key is one segment. Braces, '%', ':', spaces and control bytes of
// the key are written as '%' and two hexadecimal digits. The text is injective: different limits or keys have different
// texts. Its braces hold the group alone, so that Redis Cluster places keys of one group in one slot, and no key can
// choose another group's slot.
func AppendKey(dst []byte, limit, key string) []byte {
	group := quota.Group(key)
	dst = AppendGroup(dst, group)
	dst = AppendEscaped(dst, key[len(group):])
	dst = append(dst, ':')
	return append(dst, limit...)
}

// AppendGroup appends "{group}", escaped as in [AppendKey]: the hash tag of a group's keys.
func AppendGroup(dst []byte, group string) []byte {
	dst = append(dst, '{')
	dst = AppendEscaped(dst, group)
	return append(dst, '}')
}

// KeyGroup returns the group of a key that [AppendKey] or [AppendIDKey] made, escaped as in it: keys of one group have one
// text, which a database can use as a partition key. It is "" for any other text.
func KeyGroup(key string) string {
	end := strings.IndexByte(key, '}')
	if end < 1 || key[0] != '{' {
		return ""
	}
	return key[1:end]
}

func special(c byte) bool {
	return c <= ' ' || c == 0x7f || c == '{' || c == '}' || c == '%' || c == ':'
}

const hexDigits = "0123456789ABCDEF"

// AppendEscaped appends s with its special bytes escaped, as in [AppendKey].
func AppendEscaped(dst []byte, s string) []byte {
	for i := 0; i < len(s); i++ {
		if c := s[i]; special(c) {
			dst = append(dst, '%', hexDigits[c>>4], hexDigits[c&15])
		} else {
			dst = append(dst, c)
		}
	}
	return dst
}

// AppendIDKey appends the text under which stores keep a request id of a group: "{group}#id", escaped as in
// [AppendKey]. The key of a limit never has '#' behind its group.
func AppendIDKey(dst []byte, group, id string) []byte {
	dst = append(AppendGroup(dst, group), '#')
	return AppendEscaped(dst, id)
}

// AppendPrefix appends the text with which AppendKey's text begins for every key that begins with prefix, and for no
// other.
func AppendPrefix(dst []byte, prefix string) []byte {
	group := quota.Group(prefix)
	if len(group) < len(prefix) {
		return AppendEscaped(AppendGroup(dst, group), prefix[len(group):])
	}
	return AppendEscaped(append(dst, '{'), prefix)
}

// ParseKey returns the limit and key of a text that [AppendKey] made. ok is false for any other text, such as that of a
// request id.
func ParseKey(text string) (k ListedKey, ok bool) {
	group := KeyGroup(text)
	if group == "" {
		return k, false
	}
	path, limit, found := strings.Cut(text[len(group)+2:], ":")
	if !found || limit == "" || strings.Contains(limit, ":") {
		return k, false
	}
	k = ListedKey{limit, unescape(group + path)}
	var again [MaxStoredKey]byte
	if string(AppendKey(again[:0], k.Limit, k.Key)) != text || quota.CheckKey(k.Key) != nil {
		return ListedKey{}, false
	}
	return k, true
}

// unescape reverts AppendEscaped. Of a text that it did not make, the result is another one's.
func unescape(s string) string {
	if !strings.Contains(s, "%") {
		return s
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && i+2 < len(s) {
			b = append(b, digit(s[i+1])<<4|digit(s[i+2]))
			i += 2
		} else {
			b = append(b, s[i])
		}
	}
	return string(b)
}

func digit(c byte) byte { return byte(max(strings.IndexByte(hexDigits, c), 0)) }
