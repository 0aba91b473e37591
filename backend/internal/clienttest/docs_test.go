package clienttest

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/internal/redisserver"
)

// redisDocs returns the documentation of Redis, for users.
func redisDocs(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("../../../docs/redis.md")
	ok(t, err)
	return string(b)
}

func TestDocumentedKey(t *testing.T) {
	if !strings.Contains(redisDocs(t), "`"+readmeKey+"`") {
		t.Errorf("docs/redis.md: got none of %s, which TestClient/layout/Key checks; want it", readmeKey)
	}
}

// TestDocumentedRights: the documented ACL lines are those that TestClient/rights finds to be enough and no
// more, and they work as they stand, in a server's configuration and as a command.
func TestDocumentedRights(t *testing.T) {
	lines := regexp.MustCompile("(?m)^- (go-redis|rueidis): `(user fleet .*)`$").FindAllStringSubmatch(redisDocs(t), -1)
	if len(lines) != len(libraries) {
		t.Fatalf("ACL lines: got %v, want one for each client", lines)
	}
	for _, m := range lines {
		client := strings.ReplaceAll(m[1], "-", "")
		if want := "user fleet on >secret " + strings.Join(rightsOf(client, false), " "); m[2] != want {
			t.Errorf("ACL line of %s: got %q, want %q", client, m[2], want)
		}
		words := strings.Fields(m[2])
		configured := redisserver.StartConfig(t, redisserver.Config{Users: []string{strings.Join(words[1:], " ")}, Args: []string{"--maxmemory-policy", "noeviction"}})
		commanded := redisserver.Start(t)
		do(t, commanded, append([]string{"ACL", "SETUSER"}, words[1:]...)...)
		for _, server := range []*redisserver.Server{configured, commanded} {
			s, err := backend.Open(bg, by("redis://fleet:secret@"+server.Addr(), client))
			ok(t, err)
			ok(t, use(s, "k"))
			s.Close()
		}
	}
}
