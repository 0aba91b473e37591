package redisurl

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestDocumentedURLs: the URLs in docs/redis.md are read as it says, and its parameters are those there
// are.
func TestDocumentedURLs(t *testing.T) {
	b, err := os.ReadFile("../../../docs/redis.md")
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	seen := map[string]bool{}
	for _, m := range regexp.MustCompile("`((?:redis|valkey|unix)[a-z+]*://[^`]+)` \\| [^|]+ \\| (\\S+) \\|").FindAllStringSubmatch(text, -1) {
		c, err := parse(t, m[1])
		if err != nil {
			t.Errorf("%s: got error %v, want none", m[1], err)
			continue
		}
		scheme, _, _ := strings.Cut(m[1], ":")
		seen[scheme] = true
		client := "go-redis"
		if c.Cluster {
			client = "rueidis"
		}
		if addrs := 1 + strings.Count(m[1], "addr="); c.Username != "user" || c.Password != "password" || len(c.Addrs) != addrs || m[2] != client {
			t.Errorf("%s (%s): got %+v; want user, password, %d addresses and %s", m[1], m[2], c, addrs, client)
		}
	}
	for _, scheme := range Schemes {
		if !seen[scheme] {
			t.Errorf("docs/redis.md: got no URL with %s, want one", scheme)
		}
	}
	var listed []string
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z_]+)`(?:, `([a-z_]+)`)? \\|").FindAllStringSubmatch(text, -1) {
		for _, name := range m[1:] {
			if name != "" && name != "client" {
				listed = append(listed, name)
			}
		}
	}
	slices.Sort(listed)
	var accepted []string
	for _, scheme := range Schemes {
		p := parser{scheme: scheme}
		accepted = append(accepted, p.accepted()...)
	}
	slices.Sort(accepted)
	accepted = slices.Compact(accepted)
	if !slices.Equal(listed, accepted) {
		t.Errorf("parameters in docs/redis.md: got %v, want %v", listed, accepted)
	}
}
