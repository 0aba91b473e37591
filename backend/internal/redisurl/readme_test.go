package redisurl_test

import (
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/backend/internal/redisurl"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// section returns the documentation's page on Redis.
func section(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("../../../docs/redis.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestReadmeURLs: the URLs in docs/redis.md are read as it says, and its parameters are those there are.
func TestReadmeURLs(t *testing.T) {
	text := section(t)
	seen := map[string]bool{}
	for _, m := range regexp.MustCompile("`(redis[a-z+]*://[^`]+)` \\| [^|]+ \\| (\\S+) \\|").FindAllStringSubmatch(text, -1) {
		u, err := url.Parse(m[1])
		if err != nil {
			t.Fatal(err)
		}
		c, err := redisurl.Parse(u)
		if err != nil {
			t.Errorf("%s: %v", m[1], err)
			continue
		}
		seen[u.Scheme] = true
		want := "go-redis"
		if c.Cluster {
			want = "rueidis"
		}
		if c.Username != "user" || c.Password != "password" || len(c.Addrs) != 1+strings.Count(m[1], "addr=") || m[2] != want {
			t.Errorf("%s (%s): %+v", m[1], m[2], c)
		}
	}
	for _, scheme := range redisurl.Schemes {
		if !seen[scheme] {
			t.Errorf("no URL with %s", scheme)
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
	u := &url.URL{Scheme: "redis+sentinel", Host: "h", RawQuery: "nosuch=1"}
	_, err := redisurl.Parse(u)
	_, all, _ := strings.Cut(err.Error(), "client, ")
	accepted := strings.Split(all, ", ")
	slices.Sort(accepted)
	if !slices.Equal(listed, accepted) {
		t.Errorf("docs/redis.md lists %v; accepted are %v", listed, accepted)
	}
}

// TestReadmeRights: the ACL lines of docs/redis.md are those that TestRights finds to be enough and no more, and
// they work as they stand, on a server that has nothing else.
func TestReadmeRights(t *testing.T) {
	lines := regexp.MustCompile("(?m)^- (go-redis|rueidis): `(user fleet .*)`$").FindAllStringSubmatch(section(t), -1)
	if len(lines) != 2 {
		t.Fatalf("found %v", lines)
	}
	for _, m := range lines {
		client := strings.ReplaceAll(m[1], "-", "")
		if want := "user fleet on >secret ~quota:* " + strings.Join(rightsOf(client, false), " "); m[2] != want {
			t.Errorf("docs/redis.md has %q for %s; it takes %q", m[2], client, want)
		}
		words := strings.Fields(m[2])
		server := redisserver.StartConfig(t, redisserver.Config{Users: []string{strings.Join(words[1:], " ")}, Args: []string{"--maxmemory-policy", "noeviction"}})
		other := redisserver.Start(t)
		if _, err := other.Do(append([]string{"ACL", "SETUSER"}, words[1:]...)...); err != nil {
			t.Error(err)
		}
		for _, s := range []*redisserver.Server{server, other} {
			store, err := backend.Open(t.Context(), by("redis://fleet:secret@"+s.Addr(), client))
			if err != nil {
				t.Fatal(err)
			}
			if err := use(store, client); err != nil {
				t.Error(err)
			}
			store.Close()
		}
	}
}

// TestReadmeKey: the key that docs/redis.md shows is the key.
func TestReadmeKey(t *testing.T) {
	const key = "quota:{team-7}/agent-123:tokens"
	if !strings.Contains(section(t), "`"+key+"`") {
		t.Errorf("docs/redis.md does not show %s", key)
	}
	server := redisserver.Start(t)
	with(t, func(t *testing.T, open func(testing.TB, string) quota.Store) {
		if _, err := take(open(t, "redis://"+server.Addr()), "team-7/agent-123"); err != nil {
			t.Fatal(err)
		}
		if v, err := server.Do("KEYS", "*"); err != nil || len(v.([]any)) != 1 || v.([]any)[0] != key {
			t.Errorf("the server holds %v, %v", v, err)
		}
	})
}
