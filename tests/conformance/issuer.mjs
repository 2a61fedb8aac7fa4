// An authorization server for tests: oidc-provider, which others made, with clients that register themselves, any
// login, and JSON web tokens for one resource. Its settings are in the variable ISSUER; it says "ready".
import { Provider } from 'oidc-provider';

const { port, audience, keys, seconds, scopes } = JSON.parse(process.env.ISSUER);
const provider = new Provider(`http://127.0.0.1:${port}`, {
  jwks: { keys },
  scopes: ['openid', 'offline_access', 'read', 'propose', 'edit', 'admin'],
  cookies: { keys: ['of a test'] },
  features: {
    devInteractions: { enabled: true },
    registration: { enabled: true },
    resourceIndicators: {
      enabled: true,
      defaultResource: () => audience,
      useGrantedResource: () => true,
      getResourceServerInfo: (_context, resource) => ({
        scope: scopes,
        audience: resource,
        accessTokenFormat: 'jwt',
        accessTokenTTL: seconds,
        jwt: { sign: { alg: keys[0].alg } },
      }),
    },
  },
  findAccount: (_context, id) => ({ accountId: id, claims: () => ({ sub: id }) }),
});
provider.listen(port, '127.0.0.1', () => console.log('ready'));
